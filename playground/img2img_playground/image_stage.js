// The image in the middle of the page: the source, with the preview over it during a run; source and result compared with a slider or
// side by side. At 1x the slider's range input fills the image, so it can be dragged anywhere and moved with the keyboard. Zoomed, the
// images scroll together, and the range input is below them. For models that take one, a mask is drawn over the source: the canvas is
// white and opaque where the image is to be redrawn, and what is sent is black elsewhere.
const ZOOMS = [1, 2, 4, 8];
const MOST_PIXELS = 1024; // of the mask's longest side

function pointOf(event) {
  return { clientX: event.clientX, clientY: event.clientY };
}

export default {
  props: {
    before: String,
    beforeName: String,
    after: String,
    preview: String,
    masking: Boolean,
    mask: String,
    maskUrl: String,
    busy: Boolean,
    width: Number,
    height: Number,
  },
  data() {
    return { position: 50, beside: false, zoom: 1, drawing: false, erasing: false, brush: 8 };
  },
  computed: {
    made() {
      return this.after || (this.busy && this.preview) || "";
    },
    panes() {
      return this.beside && this.made && !this.drawing ? ["before", "made"] : ["both"];
    },
    slides() {
      return Boolean(this.after) && !this.beside && !this.drawing;
    },
    // The canvas is smaller than a large source: the server resizes the mask.
    canvasSize() {
      const scale = Math.min(1, MOST_PIXELS / Math.max(this.width, this.height));
      return [Math.max(1, Math.round(this.width * scale)), Math.max(1, Math.round(this.height * scale))];
    },
  },
  watch: {
    after(now, then) {
      if (now !== then) this.position = 50;
    },
    mask: "loadMask",
    masking(now) {
      if (!now) this.drawing = false;
    },
    busy(now) {
      if (now) this.drawing = false;
      // On a phone the button is at the bottom, and the image may be out of view.
      if (now) this.$el.scrollIntoView({ block: "nearest" });
    },
  },
  mounted() {
    this.loadMask(this.mask);
  },
  methods: {
    canvas() {
      return this.$refs.canvas?.[0];
    },
    // The mask of the session, unless it is the one that was drawn here.
    async loadMask(mask) {
      if (this.sending || (mask && mask.endsWith("/" + this.own))) return;
      this.own = "";
      await this.$nextTick();
      const pen = this.canvas()?.getContext("2d");
      pen?.clearRect(0, 0, ...this.canvasSize);
      if (!mask || !pen) return;
      const image = new Image();
      image.src = mask;
      await image.decode();
      if (this.mask !== mask) return;
      pen.drawImage(image, 0, 0, ...this.canvasSize);
      const pixels = pen.getImageData(0, 0, ...this.canvasSize);
      for (let at = 0; at < pixels.data.length; at += 4) {
        pixels.data[at + 3] = pixels.data[at];
        pixels.data.fill(255, at, at + 3);
      }
      pen.putImageData(pixels, 0, 0);
    },
    sendMask() {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = this.canvasSize;
      const pen = canvas.getContext("2d");
      pen.fillRect(0, 0, ...this.canvasSize);
      pen.drawImage(this.canvas(), 0, 0);
      return this.putMask(new Promise((done) => canvas.toBlob(done)), true);
    },
    // Masks are sent one after the other: of two at once, the older could arrive last. One that has a successor is not sent.
    async putMask(body, drawn = false) {
      const before = this.sent;
      const sent = (this.sent = (async () => {
        await before?.catch(() => {});
        if (this.sent !== sent) return;
        try {
          const answer = await fetch(this.maskUrl, { method: "PUT", body: await body });
          if (this.sent === sent) this.own = drawn ? await answer.text() : "";
        } finally {
          if (this.sent === sent) this.sending = false;
        }
      })());
      this.sending = drawn;
      await sent;
    },
    chooseMask(event) {
      this.own = "";
      if (event.target.files[0]) this.putMask(event.target.files[0]);
      event.target.value = "";
    },
    clearMask() {
      this.canvas().getContext("2d").clearRect(0, 0, ...this.canvasSize);
      this.putMask("");
    },
    invertMask() {
      const pen = this.pen();
      pen.globalCompositeOperation = "xor";
      pen.fillRect(0, 0, ...this.canvasSize);
      this.sendMask();
    },
    pen() {
      const pen = this.canvas().getContext("2d");
      Object.assign(pen, { fillStyle: "#fff", strokeStyle: "#fff", lineCap: "round", lineJoin: "round" });
      // An eraser of the same width would leave the anti-aliased edges of a stroke.
      pen.lineWidth = (Math.max(...this.canvasSize) * this.brush) / 100 + (this.erasing ? 2 : 0);
      pen.globalCompositeOperation = this.erasing ? "destination-out" : "source-over";
      return pen;
    },
    at(event) {
      const box = event.target.getBoundingClientRect();
      const [width, height] = this.canvasSize;
      return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
    },
    startStroke(event) {
      if (!event.isPrimary || event.button !== 0) return;
      event.target.setPointerCapture(event.pointerId);
      this.last = this.at(event);
      this.stroke(event);
    },
    stroke(event) {
      if (!this.last) return;
      const pen = this.pen();
      pen.beginPath();
      pen.moveTo(...this.last);
      for (const one of event.getCoalescedEvents?.() ?? []) pen.lineTo(...this.at({ ...pointOf(one), target: event.target }));
      this.last = this.at(event);
      pen.lineTo(...this.last);
      pen.stroke();
    },
    endStroke() {
      if (!this.last) return;
      this.last = null;
      this.sendMask();
    },
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
    // The browser scrolls for touch.
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
            <img v-if="pane !== 'before' && after && !drawing" class="after" :src="after" alt="The result" draggable="false" />
            <img v-if="pane !== 'made'" class="before" :src="before" :alt="'The source: ' + beforeName" draggable="false"
                 :style="slides ? { clipPath: 'inset(0 ' + (100 - position) + '% 0 0)' } : {}" />
            <img v-if="pane !== 'before' && busy && preview" class="preview" :src="preview" alt="A preview of the result" draggable="false" />
            <canvas v-if="masking" v-show="drawing || (mask && !made)" ref="canvas" class="mask-canvas" :class="{ drawing }"
                    :width="canvasSize[0]" :height="canvasSize[1]" role="img" aria-label="Mask: what is marked is redrawn"
                    @pointerdown.stop="startStroke" @pointermove="stroke" @pointerup="endStroke" @pointercancel="endStroke"></canvas>
            <span v-if="slides" class="handle" :style="{ left: position + '%' }" aria-hidden="true"></span>
          </div>
        </div>
        <template v-if="after && !drawing">
          <span class="tag tag-before" :class="{ faint: slides && position < 12 }" aria-hidden="true">Before</span>
          <span class="tag tag-after" :class="{ faint: slides && position > 88 }" aria-hidden="true">After</span>
        </template>
        <input v-if="slides" class="slide" type="range" min="0" max="100" step="1" v-model.number="position"
               aria-label="Compare before and after" :aria-valuetext="position + ' % before, ' + (100 - position) + ' % after'" />
      </div>
      <div class="stage-tools" role="group" aria-label="View">
        <button v-if="masking && !busy" type="button" class="tool" :aria-pressed="String(drawing)" @click="drawing = !drawing">Mask</button>
        <button v-if="made && !drawing" type="button" class="tool" :aria-pressed="String(beside)" @click="beside = !beside">Side by side</button>
        <button type="button" class="tool" aria-label="Zoom out" :disabled="zoom === 1" @click="zoomBy(-1)">&minus;</button>
        <output class="zoom" aria-label="Zoom">{{ zoom }}x</output>
        <button type="button" class="tool" aria-label="Zoom in" :disabled="zoom === 8" @click="zoomBy(1)">+</button>
      </div>
      <div v-if="drawing" class="stage-tools mask-tools" role="group" aria-label="Mask">
        <button type="button" class="tool" :aria-pressed="String(erasing)" @click="erasing = !erasing">Erase</button>
        <label class="brush">Brush <input type="range" min="1" max="40" v-model.number="brush" /></label>
        <button type="button" class="tool" @click="invertMask">Invert</button>
        <button type="button" class="tool" :disabled="!mask" @click="clearMask">Clear mask</button>
        <input ref="file" type="file" accept="image/*" class="mask-file" @change="chooseMask" hidden />
        <button type="button" class="tool" @click="$refs.file.click()">Load</button>
        <a v-if="mask" class="tool" :href="mask" download="mask.png">Save mask</a>
      </div>
    </div>`,
};
