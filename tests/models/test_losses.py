"""Cross-entropy in pieces: the value and the gradient of the whole, in float32 and below."""

import pytest
import torch
import torch.nn.functional as F

from pointalign.models.losses import summed_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100, None])
def test_it_is_cross_entropy(dtype, chunk):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(7, 11, generator=generator) * 5).to(dtype).requires_grad_()
    labels = torch.tensor([3, -100, 0, 10, -100, 10, 4])
    wanted = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    [gradient] = torch.autograd.grad(wanted * 0.3, logits)
    loss = summed_cross_entropy(logits, labels, chunk)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    [found] = torch.autograd.grad(loss * 0.3, logits)
    assert found.dtype == dtype
    # One step of the low precision, where the float32 gradients lie on either side of its middle.
    torch.testing.assert_close(found, gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert not found[[1, 4]].any()


def test_rows_without_labels_and_no_rows():
    logits = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert summed_cross_entropy(logits[:0], torch.empty(0, dtype=torch.long)).item() == 0


def test_large_logits_stay_finite():
    logits = torch.tensor([[3e4, -3e4, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(6e4, rel=1e-2)
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_it_makes_no_float32_copy_of_all_logits():
    """Nothing of the logits' size is allocated in float32, forward or back."""
    logits = torch.randn(64, 1000).bfloat16().requires_grad_()
    labels = torch.arange(64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        summed_cross_entropy(logits, labels, chunk=8).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 64 * 1000 * 4
