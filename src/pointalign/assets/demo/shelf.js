element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { id: button.dataset.id });
});
