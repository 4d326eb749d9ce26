// The image in the middle of the page: the source, with the preview over it during a run, or the source clipped over the result
// by a range input. The range input fills the image, so it can be dragged anywhere and moved with the keyboard.
export default {
  props: {
    before: String,
    beforeName: String,
    after: String,
    preview: String,
    busy: Boolean,
    width: Number,
    height: Number,
  },
  data() {
    return { position: 50 };
  },
  watch: {
    after(now, then) {
      if (now !== then) this.position = 50;
    },
    busy(now) {
      // On a phone the button is at the bottom, and the image may be out of view.
      if (now) this.$el.scrollIntoView({ block: "nearest" });
    },
  },
  template: `
    <div class="stage-image" :class="{ busy }" :style="{ '--ratio': width / height }">
      <img v-if="after" class="after" :src="after" alt="The result" draggable="false" />
      <img class="before" :src="before" :alt="'The source: ' + beforeName" draggable="false"
           :style="after ? { clipPath: 'inset(0 ' + (100 - position) + '% 0 0)' } : {}" />
      <img v-if="busy && preview" class="preview" :src="preview" alt="A preview of the result" draggable="false" />
      <template v-if="after">
        <span class="tag tag-before" :class="{ faint: position < 12 }" aria-hidden="true">Before</span>
        <span class="tag tag-after" :class="{ faint: position > 88 }" aria-hidden="true">After</span>
        <span class="handle" :style="{ left: position + '%' }" aria-hidden="true"></span>
        <input class="slide" type="range" min="0" max="100" step="1" v-model.number="position"
               aria-label="Compare before and after" :aria-valuetext="position + ' % before, ' + (100 - position) + ' % after'" />
      </template>
    </div>`,
};
