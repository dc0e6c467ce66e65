"""What a model's fingerprint depends on."""

from __future__ import annotations

from pathlib import Path

from pointalign.evaluation.provenance import folder_fingerprint


def test_a_fingerprint_is_of_what_answering_reads(tmp_path: Path) -> None:
    """An evaluation that is written into a model's folder does not make it another model, which could not be gone on with."""
    model = tmp_path / "model"
    (model / "language_model_adapter").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "language_model_adapter" / "adapter_model.safetensors").write_bytes(b"one")
    before = folder_fingerprint(model)
    (model / "evaluation" / "raw").mkdir(parents=True)
    (model / "evaluation" / "raw" / "answers-I.settings.json").write_text("{}")
    (model / "README.md").write_text("# model")
    assert folder_fingerprint(model) == before
    (model / "language_model_adapter" / "adapter_model.safetensors").write_bytes(b"two")
    assert folder_fingerprint(model) != before
