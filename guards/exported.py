"""A classifier that was exported to ONNX (`guards.export`), with the face of a torch one."""

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from common.conversation import UserError, one_line

# onnxruntime's builds note every session and send that to Microsoft, unless this is set before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

ONNX_FILE = "model.onnx"
ONNX_DATA = "model.onnx.data"  # its weights, where one file would be too large
NUMBER_FORMAT = "number_format"  # the file's note of what it computes in: float32 or int8
INSTALL = "needs the extra [onnx]: pip install 'guardrail-recipes[onnx]'"


def is_exported(model: str) -> bool:
    """Whether a folder holds a graph in the place of torch's weights."""
    return (Path(model) / ONNX_FILE).is_file()


class OnnxClassifier(torch.nn.Module):
    """Token ids in, logits out, by onnxruntime on the CPU.

    `ClassifierGuard` runs it as it runs a torch model, so that text, batches, windows and verdicts
    are the same code.
    """

    def __init__(self, folder: str, config: PreTrainedConfig):
        """Open the graph.

        Raises:
            UserError: onnxruntime is not installed, or cannot read the file.
        """
        super().__init__()
        path = Path(folder) / ONNX_FILE
        if find_spec("onnxruntime") is None:
            raise UserError(f"{path}: {INSTALL}")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers)
        except Exception as error:  # onnxruntime's errors share no base class
            raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
        notes = self.session.get_modelmeta().custom_metadata_map
        self.dtype = notes.get(NUMBER_FORMAT, "float32")
        self.config = config

    def get_input_embeddings(self) -> SimpleNamespace:
        """What `common.fit` asks: how many tokens the graph knows."""
        return SimpleNamespace(num_embeddings=self.config.vocab_size)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Logits [rows, labels] of padded ids [rows, tokens]."""
        inputs = {
            "input_ids": input_ids.cpu().numpy(),
            "attention_mask": attention_mask.cpu().numpy(),
        }
        (logits,) = self.session.run(["logits"], inputs)
        return SequenceClassifierOutput(logits=torch.from_numpy(logits))
