"""A classifier guard as ONNX, for machines with a CPU and without torch's kernels.

    python -m guards.export output/quickstart --onnx            # output/quickstart-onnx
    python -m guards.export output/quickstart --onnx --int8     # output/quickstart-onnx-int8

The new folder is a guard like any other: `load_guard` reads it. Before it is there, it judges rows
beside the guard that it was made of. Where more than 1 % of the verdicts flip, nothing is written.
"""

import argparse
import copy
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from common import report
from common.conversation import Messages, UserError, judged_label, one_line, parts_of
from common.data import load_conversations, spread
from common.data.specs import about_data
from common.fit import fit_classifier, positions
from common.model_card import write_model_card
from common.run import expand_home, manifest, run_cli, write_json
from common.saving import refuse_to_overwrite, whole_folder
from guards import add_probe, load_guard
from guards.card import ClassifierCard, read_card
from guards.classifier import ClassifierGuard
from guards.exported import INSTALL, NUMBER_FORMAT, ONNX_DATA, ONNX_FILE, is_exported

logger = logging.getLogger("export")
MOST_FLIPPED = 0.01  # share of the verdicts
# Weights in blocks of so many, each with its own scale. One scale for all activations of a layer,
# as onnxruntime's `quantize_dynamic` has it, flips a third of a decoder's verdicts: a few of them
# are 1,000 times the others.
BLOCK = 32
# onnxruntime's words for what is multiplied: products in 8 bits, which are fast, and, where these
# flip verdicts, in float32, which are as slow as torch's.
PRODUCTS = {"8 bits": 4, "float32": 1}


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m guards.export", description=__doc__, formatter_class=kind
    )
    parser.add_argument("folder", type=expand_home, help="folder of a classifier guard")
    parser.add_argument("--onnx", action="store_true", required=True, help="the format")
    parser.add_argument("--int8", action="store_true", help="weights in 8 bits")
    parser.add_argument(
        "--output_dir", type=expand_home, help="default: the folder's name with -onnx or -onnx-int8"
    )
    parser.add_argument(
        "--data",
        type=expand_home,
        default="beavertails-sample:test",
        help="data spec of rows that both guards judge; take rows like your own",
    )
    parser.add_argument("--max_rows", type=int, default=200, help="so many, evenly spaced")
    parser.add_argument("--overwrite", action="store_true", help="replace a guard that is there")
    args = parser.parse_args()
    if args.max_rows < 1:
        raise UserError(f"--max_rows {args.max_rows}: must be at least 1")
    folder = args.folder.rstrip("/")
    output = args.output_dir or f"{folder}-onnx" + "-int8" * args.int8
    refuse_to_overwrite(output, args.overwrite, flag="--overwrite")
    rows = spread(load_conversations(args.data)["messages"], args.max_rows)
    export(folder, output, rows, int8=args.int8, data=args.data)
    print(f"Wrote {output}")


def export(
    folder: str, output: str, rows: Sequence[Messages], *, int8: bool = False, data: str = "rows"
) -> None:
    """Write a classifier guard as ONNX, whole or not at all.

    Args:
        rows: conversations, of which both guards judge what the guard was trained on.
        data: what they are called in the model card.

    Raises:
        UserError: no classifier guard, torch cannot export it, or too many verdicts flip.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f"--onnx: {package} is not installed; {INSTALL}")
    card = read_card(folder, ClassifierCard)
    if is_exported(folder):
        raise UserError(f"{folder}: is exported; name the folder that was trained")
    if Path(output).resolve() == Path(folder).resolve():
        raise UserError(f"--output_dir {output}: is the guard itself; name another folder")
    guard = load_guard(folder)
    if card.input is not None:
        parts = [parts_of(messages) for messages in rows]
        rows = [one[card.input] for one in parts if card.input in one]
    with whole_folder(output) as partial, TemporaryDirectory() as scratch:
        model = float32_model(folder, guard)
        graph = Path(scratch) / ONNX_FILE
        write_graph(model, graph)
        write_config(model, partial)
        guard.tokenizer.save_pretrained(partial)
        for products in PRODUCTS if int8 else [None]:
            if int8:
                quantize(graph, partial / ONNX_FILE, PRODUCTS[products])
            else:
                for path in graph.parent.iterdir():
                    shutil.move(path, partial)
            parity = parity_of(partial, card, guard, rows)
            print(f"Products in {products or 'float32'}:\n\n{parity.table()}")
            if parity.share_flipped <= MOST_FLIPPED:
                break
        parity.refuse_flipped(folder)
        write_readme(partial, card, guard, parity, data)
        settings = {"folder": folder, "int8": int8, "products": products}
        found = {"data": data, **parity.facts()}
        write_json(partial / "run.json", manifest([settings], **found))


def parity_of(
    folder: Path, card: ClassifierCard, guard: ClassifierGuard, rows: Sequence[Messages]
) -> "Parity":
    """What the exported guard says beside the guard; its card, with a probe, is written first."""
    exported = add_probe(folder, card.model_copy(update={"probe": None}))
    if exported is None:
        raise UserError(f"{guard.name}: too little memory to compare what is exported with it")
    exported.name = f"{guard.name} as ONNX"
    return compare(guard, exported, rows)


# --- the graph ------------------------------------------------------------------------------------


class Logits(torch.nn.Module):
    """A classifier with plain tensors for inputs and output, as a graph has them."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def float32_model(folder: str, guard: ClassifierGuard) -> PreTrainedModel:
    """The guard's model as it was saved: on a GPU the guard itself computes in 16 bits."""
    config = copy.deepcopy(guard.model.config)
    config.use_cache = False
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, dtype=torch.float32
    )
    fit_classifier(guard.tokenizer, model)
    return model.eval()


def write_graph(model: PreTrainedModel, path: Path) -> None:
    """Write the graph, of any number of rows and tokens.

    Raises:
        UserError: torch cannot export this architecture.
    """
    for chatty in ("torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    pad = model.config.pad_token_id
    ids = torch.full((2, 8), pad + 1)
    ids[1, 6:] = pad
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    try:
        program = torch.onnx.export(
            Logits(model).eval(),
            (ids, (ids != pad).long()),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(sizes, sizes),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        what = f"torch cannot export a {model.config.model_type} classifier"
        raise UserError(f"{what}: {one_line(error.__cause__ or error)}") from None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with paths of this machine
    program.model.metadata_props[NUMBER_FORMAT] = "float32"
    program.save(path)


def quantize(graph: Path, path: Path, accuracy_level: int) -> None:
    """Write a graph with weights of 8 bits.

    Args:
        accuracy_level: of PRODUCTS.
    """
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer

    matmul_nbits_quantizer.logger.setLevel(logging.WARNING)  # it names every node
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(graph),
        bits=8,
        block_size=BLOCK,
        is_symmetric=False,
        accuracy_level=accuracy_level,
    )
    quantizer.process()
    onnx.helper.set_model_props(quantizer.model.model, {NUMBER_FORMAT: "int8"})
    path.unlink(missing_ok=True)
    path.with_name(ONNX_DATA).unlink(missing_ok=True)  # onnx would append to it
    large = graph.with_name(ONNX_DATA).exists()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=large)


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """config.json; the tokens that the graph sees stand in it, because no table tells them here."""
    config = copy.deepcopy(model.config)
    room = positions(model)
    if room is not None:
        config.max_position_embeddings = room
    config.save_pretrained(folder)


# --- parity ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """What two guards say of the same rows: a line an output, "flagged" first."""

    outputs: pandas.DataFrame
    seconds: dict[str, float]  # of the guard, and of the exported one

    @property
    def share_flipped(self) -> float:
        """Of the verdicts; the single categories do not count."""
        verdicts = self.outputs.iloc[0]
        return verdicts.flipped / verdicts.rows

    def table(self) -> str:
        """In markdown, with the seconds that each took."""
        times = "{torch:.1f} s with torch, {onnx:.1f} s with ONNX".format(**self.seconds)
        outputs = self.outputs.assign(threshold=self.outputs.threshold.map(report.threshold))
        text = report.table(outputs.to_numpy().tolist(), list(outputs))
        return f"{text}\n{outputs.rows[0]} rows took {times}.\n"

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return {"parity": self.outputs.to_dict("records"), "seconds": self.seconds}

    def refuse_flipped(self, folder: str) -> None:
        """Raise UserError where too many verdicts are others than those of the guard."""
        if self.share_flipped > MOST_FLIPPED:
            share = f"{self.share_flipped:.1%} of the verdicts flip"
            hint = "nothing is written; leave out --int8, or judge more rows (--data, --max_rows)"
            raise UserError(f"{folder}: {share}, more than {MOST_FLIPPED:.0%}; {hint}")


def compare(guard: ClassifierGuard, exported: ClassifierGuard, rows: Sequence[Messages]) -> Parity:
    """Both guards' verdicts on the same rows, at the guard's own thresholds.

    Rows on which the guard itself fails say nothing. One on which the exported guard fails is
    flipped.

    Raises:
        UserError: the guard gives no verdict on any of the rows.
    """
    start = time.perf_counter()
    expected = scores_of(guard, rows)
    middle = time.perf_counter()
    found = scores_of(exported, rows)
    end = time.perf_counter()
    expected = expected.dropna()
    if expected.empty:
        raise UserError(f"{guard.name}: gives no verdict on any of the rows (--data)")
    found = found.loc[expected.index]
    thresholds = {name: one["value"] for name, one in guard.thresholds.items()}
    default = thresholds.get("flagged", 0.5)
    above = pandas.Series({name: thresholds.get(name, default) for name in expected})
    flips = ((expected > above) != (found > above)) | found.isna()
    outputs = pandas.DataFrame(
        {
            "output": list(expected),
            "threshold": above.to_numpy(),
            "rows": len(expected),
            "flipped": flips.sum().to_numpy(),
            "largest difference": [f"{apart:.2g}" for apart in (expected - found).abs().max()],
        }
    )
    return Parity(outputs, {"torch": middle - start, "onnx": end - middle})


def scores_of(guard: ClassifierGuard, rows: Sequence[Messages]) -> pandas.DataFrame:
    """A guard's probabilities, one row a conversation: "flagged", and its labels; NaN for errors."""
    scores = []
    for messages, verdict in zip(rows, guard.judge(rows), strict=True):
        row = {}
        if verdict.error is None:
            row = {"flagged": verdict.score(judged_label(messages)), **verdict.categories}
        scores.append(row)
    return pandas.DataFrame(scores, columns=["flagged", *guard.labels])


# --- the model card -------------------------------------------------------------------------------


def write_readme(
    folder: Path, card: ClassifierCard, guard: ClassifierGuard, parity: Parity, data: str
) -> None:
    """README.md: what it was made of, how to use it, and how near it comes."""
    train_data = card.data.get("train_data")
    write_model_card(
        folder,
        title=f"{guard.name} as ONNX",
        base_model=card.base_model or guard.name,
        train_data=[train_data] if isinstance(train_data, str) else [],
        intro=INTRO,
        usage=USAGE,
        sections={f"Beside the guard itself, on {about_data(data)['name']}": parity.table()},
    )


INTRO = """A guard of Guardrail Recipes, exported by `python -m guards.export`. `model.onnx` takes padded ids and
their attention mask, of any size, and gives logits; config.json names them. The licences of the base model and the data
apply."""
USAGE = """from guards import load_guard

guard = load_guard(".")  # onnxruntime on the CPU
guard.judge([[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]])"""


if __name__ == "__main__":
    run_cli(main)
