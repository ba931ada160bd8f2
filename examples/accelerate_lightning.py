# %% [markdown]
# # Accelerate in a Lightning training
#
# `pip install lightning`. Accelerate the network where the module is made, before Lightning wraps it.

# %%
import lightning
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import asvit_fast as af

SIDE = 64


class Classifier(lightning.LightningModule):
    """A Swin that learns ten classes, coarse tokens first."""

    def __init__(self, schedule: str = "1:2,1:1") -> None:
        super().__init__()
        self.network = timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=SIDE,
            window_size=4,
            num_classes=10,
            embed_dim=32,
            depths=(1, 1, 2, 1),
        )
        af.accelerate(self.network)
        self.retokenizer = af.Retokenizer(self.network, schedule)

    def on_train_epoch_start(self) -> None:
        self.retokenizer.step(self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch  # [B, 3, H, W], [B]
        loss = nn.functional.cross_entropy(self.network(images), labels)
        print(
            f"epoch {self.current_epoch}, {self.retokenizer.reduction} x fewer tokens per side: loss {loss.item():.3f}"
        )
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


# %%
torch.manual_seed(0)
data = TensorDataset(torch.randn(16, 3, SIDE, SIDE), torch.randint(10, (16,)))
trainer = lightning.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
classifier = Classifier()
trainer.fit(classifier, DataLoader(data, batch_size=8))
assert classifier.retokenizer.reduction == 1
