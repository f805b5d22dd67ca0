"""The small ViT that is trained here: the same from the same seed, and taken up again with another head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attninject.delta_file import detached, save_tensors
from attninject.errors import UnknownModelError
from attninject.evidence import source_net


@pytest.fixture
def one_font(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if one font were installed."""
    fonts = sorted(Path("/usr/share/fonts").rglob("*.ttf"))
    if not fonts:
        pytest.skip("no fonts are installed")
    monkeypatch.setattr(source_net, "fonts_by_maker", lambda *_: {"one": fonts[:1]})


@pytest.mark.usefixtures("one_font")
def test_the_same_seed_gives_the_same_net(tmp_path: Path) -> None:
    """Two trainings agree to the bit, say how far they are, and leave the generator; the file is read with any head."""
    before, lines = torch.get_rng_state(), []
    first, again = (source_net.train(seed=3, steps=2, batch=2, say=say) for say in (None, lines.append))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(lines) == 1
    assert lines[0].startswith("step 2/2: loss ")
    state = first.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in again.state_dict().items())
    file = tmp_path / "vit.safetensors"
    save_tensors(detached(state), file, {"format": "pt"})
    taken = source_net.build(4, file)
    assert taken(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    assert torch.equal(taken.pos_embed, first.pos_embed)
    save_tensors({"x": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(UnknownModelError):
        source_net.build(4, file)


@pytest.mark.usefixtures("one_font")
def test_photographs_come_in_with_contrast() -> None:
    """Without contrast the ground is one colour; with it, the photograph; the ink is apart from the mean."""
    photo = torch.rand(3, 80, 80, generator=torch.Generator().manual_seed(0)) * 0.4
    flat, whole = (
        source_net.images([fonts], [photo], 4, torch.Generator().manual_seed(1), contrast)
        for fonts in (source_net.fonts_by_maker()["one"],)
        for contrast in (0.0, 1.0)
    )
    assert torch.equal(flat.labels, whole.labels)
    corner = flat.images[:, :, :2, 0].std(2).max(), whole.images[:, :, :2, 0].std(2).max()
    assert corner[0] < 1e-6 < corner[1]
    assert float((flat.images.amax((2, 3)) - flat.images[:, :, 0, 0]).min()) > 0.5  # dark ground, light ink
