"""The examples of torch_bridge/README.md beside other libraries: a feature pyramid, a decoder, a
Lightning module, and MONAI's transforms on real scans."""

import re
import sys
import zipfile

import numpy as np
import pytest

from data_prep.raw import scans
from data_prep.scan.rules import Rules
from tests.helpers.training_runs import PROJECT

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[torch]'")
from ctssl_jax.torch_bridge import ctssl_torch  # noqa: E402  (it needs PyTorch)

WINDOW = (50.0, 350.0)
README = (PROJECT / "ctssl_jax" / "torch_bridge" / "README.md").read_text()


def example(words, **given):
    """The names that the README's Python block with these words defines."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (block,) = [text for text in blocks if words in text]
    namespace = {"torch": torch, "numpy": np, "ctssl_torch": ctssl_torch, **given}
    exec(block, namespace)
    return namespace


@pytest.fixture(autouse=True)
def folder_on_the_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "ctssl_torch", ctssl_torch)


@pytest.fixture
def model():
    torch.manual_seed(0)
    settings = dict(in_channels=1, hidden=(6, 10), depth=2, embedding_dim=5, num_codes=16)
    return ctssl_torch.VQVAE(**settings).eval()


@pytest.fixture
def images():
    return torch.rand(4, 1, 32, 48, generator=torch.Generator().manual_seed(1))


def test_features_pyramid_and_classifier(model, images, monkeypatch):
    monkeypatch.setattr(ctssl_torch, "load", lambda folder: model)
    with torch.no_grad():
        made = example("reset_classifier(2)", images=images)
    assert made["half"].shape == (4, 6, 16, 24) and made["quarter"].shape == (4, 5, 8, 12)
    backbone = made["backbone"]
    assert backbone.feature_info.channels() == [6, 5]
    assert backbone.feature_info.reduction() == [2, 4]
    with torch.no_grad():
        pooled = backbone.forward_head(made["latents"], pre_logits=True)
        assert torch.equal(pooled, model.embedding(images))
        assert torch.equal(made["logits"], backbone.get_classifier()(pooled))
        backbone.reset_classifier(0)
        assert torch.equal(backbone.forward_head(made["latents"]), pooled)


def test_a_decoder_learns_on_a_frozen_backbone(model, images):
    backbone = ctssl_torch.Features(model)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    network = example("class Segmentation")["Segmentation"](backbone, 2).train()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-2)
    target = (images[:, 0] > 0.5).long()
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(network(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_lightning_trains_backbone_and_classifier(model, images, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    module = example("class SliceClassifier")["SliceClassifier"](ctssl_torch.Features(model), 2)
    before = {name: value.clone() for name, value in module.named_parameters()}
    labels = torch.tensor([0, 1, 0, 1])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels), batch_size=2
    )
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    changed = {n for n, value in module.named_parameters() if not torch.equal(value, before[n])}
    assert {"backbone.fc.weight", "backbone.encoder.0.0.weight"} <= changed


def prepared(scan, size):
    """The slices that data_prep makes of a scan: [S, 1, size, size] float32 in [0, 1]."""
    plan = scans.plan_scans(scan, rules=Rules())
    (exam,) = plan.exams
    read = scans.read_scan(plan.input_dir, exam, (WINDOW,), size, Rules(), b"key")
    return read.images.transpose(0, 3, 1, 2).astype(np.float32) / 255


@pytest.mark.parametrize("name", ["lidc_0001", "lidc_0003.zip"])
def test_monai_ends_in_the_pixels_of_the_preparation(name, real_data, tmp_path):
    monai = pytest.importorskip("monai", reason="monai is not installed")
    folder = scan = real_data / name
    if scan.suffix == ".zip":
        folder = tmp_path / "scan"
        with zipfile.ZipFile(scan) as archive:
            archive.extractall(folder)
        folder = max((path.parent for path in folder.rglob("*.dcm")), key=lambda path: str(path))
    made = example("class Slices")
    for size in (512, 96):
        preprocessing = {"windows": [WINDOW], "image_size": size}
        found = made["chain"](preprocessing)(str(folder)).numpy()
        np.testing.assert_array_equal(found, prepared(scan, size), err_msg=f"{size}")
    own = monai.transforms.Resize((size, size, -1), mode="trilinear", anti_aliasing=True)
    volume = monai.transforms.Compose(made["chain"](preprocessing).transforms[:3])(str(folder))
    grey = made["to_grey"](*WINDOW)(own(volume))[0].permute(2, 1, 0).numpy()
    off = np.abs(np.rint(grey) - 255 * found[:, 0])
    print(f"{name}: MONAI's Resize differs by {off.mean():.2f} grey levels, at most {off.max():g}")
    assert off.max() > 0
