// The image in the middle of the page: the source, with the preview over it during a run; source and result compared with a slider or
// side by side. At 1x the slider's range input fills the image, so it can be dragged anywhere and moved with the keyboard. Zoomed, the
// images scroll together, and the range input is below them.
const ZOOMS = [1, 2, 4, 8];

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
    return { position: 50, beside: false, zoom: 1 };
  },
  computed: {
    made() {
      return this.after || (this.busy && this.preview) || "";
    },
    panes() {
      return this.beside && this.made ? ["before", "made"] : ["both"];
    },
    slides() {
      return Boolean(this.after) && !this.beside;
    },
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
  methods: {
    zoomBy(direction) {
      const at = ZOOMS.indexOf(this.zoom) + direction;
      this.zoomTo(ZOOMS[Math.min(ZOOMS.length - 1, Math.max(0, at))]);
    },
    async zoomTo(zoom) {
      const pane = this.$refs.panes[0];
      const [x, y] = ["Left", "Top"].map((side, index) => {
        const view = index ? pane.clientHeight : pane.clientWidth;
        return (pane["scroll" + side] + view / 2) / (index ? pane.scrollHeight : pane.scrollWidth);
      });
      this.zoom = zoom;
      await this.$nextTick();
      // The middle of the view stays in the middle.
      pane.scrollTo(x * pane.scrollWidth - pane.clientWidth / 2, y * pane.scrollHeight - pane.clientHeight / 2);
    },
    follow(event) {
      for (const pane of this.$refs.panes)
        if (pane !== event.target) {
          pane.scrollLeft = event.target.scrollLeft;
          pane.scrollTop = event.target.scrollTop;
        }
    },
    // Touch scrolls by itself.
    grab(event) {
      if (this.zoom > 1 && event.pointerType === "mouse" && event.button === 0) event.currentTarget.setPointerCapture(event.pointerId);
    },
    drag(event) {
      const pane = event.currentTarget;
      if (pane.hasPointerCapture(event.pointerId)) pane.scrollBy(-event.movementX, -event.movementY);
    },
  },
  template: `
    <div class="stage-view" :class="{ busy, beside: panes.length > 1, zoomed: zoom > 1 }" :style="{ '--ratio': width / height, '--zoom': zoom }">
      <div class="stage-panes">
        <div v-for="pane in panes" :key="pane" ref="panes" class="stage-image" @scroll="follow" @pointerdown="grab" @pointermove="drag"
             :tabindex="zoom > 1 ? 0 : null" :role="zoom > 1 ? 'group' : null"
             :aria-label="zoom > 1 ? 'Zoomed image: scroll to move' : null">
          <div class="stage-canvas">
            <img v-if="pane !== 'before' && after" class="after" :src="after" alt="The result" draggable="false" />
            <img v-if="pane !== 'made'" class="before" :src="before" :alt="'The source: ' + beforeName" draggable="false"
                 :style="slides ? { clipPath: 'inset(0 ' + (100 - position) + '% 0 0)' } : {}" />
            <img v-if="pane !== 'before' && busy && preview" class="preview" :src="preview" alt="A preview of the result" draggable="false" />
            <span v-if="slides" class="handle" :style="{ left: position + '%' }" aria-hidden="true"></span>
          </div>
        </div>
        <template v-if="after">
          <span class="tag tag-before" :class="{ faint: slides && position < 12 }" aria-hidden="true">Before</span>
          <span class="tag tag-after" :class="{ faint: slides && position > 88 }" aria-hidden="true">After</span>
        </template>
        <input v-if="slides" class="slide" type="range" min="0" max="100" step="1" v-model.number="position"
               aria-label="Compare before and after" :aria-valuetext="position + ' % before, ' + (100 - position) + ' % after'" />
      </div>
      <div class="stage-tools" role="group" aria-label="View">
        <button v-if="made" type="button" class="tool" :aria-pressed="String(beside)" @click="beside = !beside">Side by side</button>
        <button type="button" class="tool" aria-label="Zoom out" :disabled="zoom === 1" @click="zoomBy(-1)">&minus;</button>
        <output class="zoom" aria-label="Zoom">{{ zoom }}x</output>
        <button type="button" class="tool" aria-label="Zoom in" :disabled="zoom === 8" @click="zoomBy(1)">+</button>
      </div>
    </div>`,
};
