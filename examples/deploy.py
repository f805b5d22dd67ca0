"""A fine-tuned network with blocks, written as TorchScript, ONNX and OpenVINO, and run again from each file.

python examples/deploy.py                    (pip install "attninject[export]"; openvino where you want it)

What to expect: for each file the largest difference from the network it came from, a few 1e-6 for outputs near 1. The
blocks are ordinary layers in the files; where these run, attninject need not be installed. A run of the command line is
written with `attninject export runs/a --to onnx`, which measures the same.
"""

import tempfile
import warnings

import onnxruntime
import timm
import torch

import attninject as ai

torch.manual_seed(0)
model = timm.create_model(
    "test_resnet", num_classes=4
).eval()  # yours: trained, or `ai.training.trained("runs/a")`
ai.inject(model, "cbam")
with torch.no_grad():  # blocks that do something
    for block in ai.injected(model).values():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

x = torch.randn(3, 3, 96, 96)
with torch.no_grad():
    wanted = model(x)


def compare(name: str, found: torch.Tensor) -> None:
    """One line."""
    print(f"{name}: largest difference below 1e-4: {(found - wanted).abs().max().item() < 1e-4}")


with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # exporters deprecate parts of themselves

    torch.jit.script(model).save(f"{folder}/net.ts")  # or torch.jit.trace(model, x)
    with torch.no_grad():
        compare("TorchScript", torch.jit.load(f"{folder}/net.ts")(x))

    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        model,
        (x,),
        f"{folder}/net.onnx",
        dynamo=True,
        dynamic_shapes=(batch,),
        input_names=["x"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(f"{folder}/net.onnx", providers=["CPUExecutionProvider"])
    compare("ONNX", torch.from_numpy(session.run(None, {"x": x.numpy()})[0]))

    try:
        import openvino
    except ImportError:
        print("OpenVINO: not installed")
    else:
        converted = openvino.convert_model(f"{folder}/net.onnx")  # or from the model: example_input=x
        openvino.save_model(converted, f"{folder}/net.xml", compress_to_fp16=False)
        hints = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.compile_model(f"{folder}/net.xml", "CPU", hints)
        compare("OpenVINO", torch.from_numpy(compiled(x.numpy())[0]))
