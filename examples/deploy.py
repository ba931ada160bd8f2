# %% [markdown]
# # From a topology to int8, torch.export and ONNX
#
# `pip install torchao onnx onnxscript onnxruntime`. Every file is run and compared here.

# %%
import copy
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import asvit_fast as af
from asvit_fast.export import export

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
model = af.create_model("4,2,3|2,1,2|3,1,4|2,1,6|16,32", img_size=32, num_classes=10).eval()
images = torch.randn(4, 3, 32, 32)  # [B, 3, H, W]
with torch.no_grad():
    expected = model(images)  # [B, 10]

# %% [markdown]
# ## torch.export: a file that needs torch alone

# %%
export(model, folder, format="exported")
program = torch.export.load(folder / "model.pt2").module()
torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## ONNX

# %%
export(model, folder, format="onnx")
session = onnxruntime.InferenceSession(folder / "model.onnx")
(found,) = session.run(["logits"], {"images": images.numpy()})
torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## int8
#
# All Linear layers, which hold nearly all products.

# %%
quantised = copy.deepcopy(model)
quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
with torch.no_grad():
    found = quantised(images)
error = (found - expected).norm() / expected.norm()
print(f"int8: relative error {error:.1%}")
assert error < 0.1

# %%
for file in sorted(folder.iterdir()):
    print(f"{file.name:14} {file.stat().st_size / 1e6:.2f} MB")
