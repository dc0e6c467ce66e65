// A dropped file goes to the server under a word that only this page knows; no path of the server ever comes back.
const zone = element.querySelector(".zone");
const input = element.querySelector("input");
const words = element.querySelector(".words");
const bar = element.querySelector(".bar");
const atRest = words.innerHTML;
element.querySelector(".limits").textContent = props.limits;
input.accept = props.endings;
let request = null;

function done() {
  request = null;
  bar.hidden = true;
  words.innerHTML = atRest;
  input.value = "";
}

function send(file) {
  if (!file) return;
  if (file.size > props.most) {
    trigger("input", { message: `${file.name} is larger than the ${props.largest} that are taken; make it smaller` });
    input.value = "";
    return;
  }
  request?.abort();
  const mine = (request = new XMLHttpRequest());
  words.textContent = `Sending ${file.name} ...`;
  bar.hidden = false;
  mine.upload.onprogress = (event) => {
    bar.firstElementChild.style.width = `${(100 * event.loaded) / Math.max(event.total, 1)}%`;
  };
  mine.onload = () => {
    if (mine.status === 200) trigger("upload", { word: mine.responseText });
    else trigger("input", { message: mine.responseText.slice(0, 300) });
    done();
  };
  mine.onerror = () => {
    trigger("input", { message: `${file.name} did not arrive; try again` });
    done();
  };
  mine.open("POST", `${props.address}?name=${encodeURIComponent(file.name)}`);
  mine.send(file);
}

input.addEventListener("change", () => send(input.files[0]));
zone.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") input.click();
});
for (const name of ["dragover", "dragleave", "drop"])
  zone.addEventListener(name, (event) => {
    event.preventDefault();
    zone.classList.toggle("over", name === "dragover");
    if (name === "drop") send(event.dataTransfer.files[0]);
  });
