// Accepts an image by drop (anywhere on the page, or on its button), paste or file choice, and uploads the file to the playground's server, which
// validates it. Only too large files are refused here.
export default {
  props: { url: String, accept: String, mostBytes: Number, compact: Boolean, hint: String, label: String, everywhere: Boolean, multiple: Boolean },
  emits: ["refused"],
  data() {
    return { over: false, near: false, sending: false };
  },
  mounted() {
    this.listeners = this.everywhere ? {
      dragover: (event) => this.drag(event, true),
      dragleave: (event) => event.relatedTarget === null && this.drag(event, false),
      drop: (event) => this.drop(event),
      paste: (event) => this.paste(event),
    } : {};
    for (const [name, listener] of Object.entries(this.listeners)) document.addEventListener(name, listener);
  },
  unmounted() {
    for (const [name, listener] of Object.entries(this.listeners)) document.removeEventListener(name, listener);
  },
  methods: {
    drag(event, over) {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.over = over;
    },
    hover(event, near) {
      if (this.everywhere || !event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.near = near;
    },
    dropHere(event) {
      if (this.everywhere) return;
      this.near = false;
      this.drop(event);
    },
    drop(event) {
      this.over = false;
      if (event.defaultPrevented) return; // Another picker took it.
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.sendAll([...event.dataTransfer.files]);
    },
    paste(event) {
      const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
      if (!file) return;
      event.preventDefault();
      this.sendAll([file]);
    },
    choose(event) {
      this.sendAll([...event.target.files]);
      event.target.value = ""; // Allows choosing the same file again.
    },
    async sendAll(files) {
      if (this.sending) return;
      this.sending = true;
      const url = this.url; // It may change after the first file.
      for (const file of this.multiple ? files : files.slice(0, 1)) await this.send(file, url);
      this.sending = false;
    },
    async send(file, url) {
      if (file.size > this.mostBytes) return this.$emit("refused", { name: file.name, size: file.size });
      try {
        const headers = { "x-file-name": encodeURIComponent(file.name), "content-type": "application/octet-stream" };
        await fetch(url, { method: "PUT", body: file, headers });
      } catch {
        this.$emit("refused", { name: file.name, size: -1 });
      }
    },
  },
  template: `
    <div class="picker" :class="{ compact, over, near, sending }"
      @dragover="hover($event, true)" @dragleave="hover($event, false)" @drop="dropHere">
      <input ref="file" type="file" :accept="accept" :multiple="multiple" @change="choose" hidden />
      <button type="button" class="picker-button" @click="$refs.file.click()">
        <span class="picker-icon material-icons" aria-hidden="true">{{ compact && everywhere ? "swap_horiz" : "add_photo_alternate" }}</span>
        <span class="picker-title">{{ sending ? "Reading ..." : compact ? label : "Drop an image here" }}</span>
        <span v-if="!compact" class="picker-hint">{{ hint }}</span>
      </button>
      <div v-if="over" class="picker-veil" aria-hidden="true">Drop it anywhere</div>
    </div>`,
};
