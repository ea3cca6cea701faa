"""How much of the accuracy that rounding loses does QAT win back, at 4, 3 and 2 bits (group 32)?

    python -m benchmarks.qat_recovery                                   the sample reviews
    python -m benchmarks.qat_recovery --sst2 ../shared/data/sst2        SST-2 (train.tsv, dev.tsv, test.tsv), 120 steps a stage

The recipe qat_int4_bert as it is (all-MiniLM-L6-v2, int8 embeddings, signed_absmax) at each number of bits and seed; the float model of
a seed is trained once and shared. Recovery is (QAT - RTN) / (float - RTN), from accuracies averaged over the seeds. `--rule absmax` shows
another grid.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks._common import composed, markdown, start
from qtrain.record import Record
from qtrain.stages import fit_stage, load, measure, quantize


def configuration(overrides: list[str]) -> Any:
    """The recipe with overrides, as dataclasses."""
    return OmegaConf.to_object(composed(["+recipe=qat_int4_bert", "export=[]", *overrides]))


def one_seed(seed: int, bits: list[int], overrides: list[str]) -> dict[str, dict[str, float]]:
    """Stage name ("float", "rtn 3", "qat 3") -> metrics on the test split."""
    results: dict[str, dict[str, float]] = {}
    config = configuration([f"seed={seed}", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        setup, float_model = load(config, Record(Path(folder), "benchmark", seed, {}), Path(folder) / "float")
        fit_stage(setup, "float", float_model, config.finetune)
        float_logits = measure(setup, "float", float_model)
        stages = setup.record.data["stages"]
        results["float"] = stages["float"]
        for b in bits:
            setup.config = configuration([f"seed={seed}", *overrides, f"quantizer.weight.bits={b}"])
            setup.folder = Path(folder) / str(b)
            scheme, model = setup.config.quantizer, quantize(setup, float_model)
            measure(setup, "ptq", model, float_logits)
            fit_stage(setup, "qat", model, scheme.fit, scheme.callbacks(), teacher=float_model)
            measure(setup, "qat", model, float_logits)
            results[f"rtn {b}"], results[f"qat {b}"] = stages["ptq"], stages["qat"]
            print(
                f"seed {seed}, {b} bits: {stages['float']['accuracy']:.4f} {stages['ptq']['accuracy']:.4f} {stages['qat']['accuracy']:.4f}",
                flush=True,
            )
    return results


def table(runs: list[dict[str, dict[str, float]]], bits: list[int]) -> str:
    """Means over the seeds, and the recovery."""

    def mean(stage: str, metric: str) -> float:
        return statistics.fmean(run[stage][metric] for run in runs)

    rows = []
    for b in bits:
        top, rtn, qat = (mean(stage, "accuracy") for stage in ("float", f"rtn {b}", f"qat {b}"))
        losses = [f"{mean(stage, 'loss'):.3f}" for stage in ("float", f"rtn {b}", f"qat {b}")]
        lost = top - rtn
        recovery = f"{100 * (qat - rtn) / lost:.0f} %" if lost > 0.005 else "nothing lost"
        rows.append([f"{b}", *(f"{100 * a:.2f} %" for a in (top, rtn, qat)), recovery, *losses])
    return markdown(["bits", "float", "RTN", "QAT", "recovered", "loss float", "loss RTN", "loss QAT"], rows)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", type=Path, help="folder with train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--rule", default="signed_absmax")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides")
    args = parser.parse_args()
    start()
    overrides = [f"quantizer.weight.rule={args.rule}", *args.overrides]
    if args.sst2:
        files = {key: args.sst2 / f"{name}.tsv" for key, name in (("train", "train"), ("validation", "dev"), ("test", "test"))}
        overrides += ["data=csv", *(f"data.{key}={path}" for key, path in files.items())]
        overrides += [
            "data.text_column=sentence",
            "data.eval_text_column=content",
            "data.label_column=label",
            "finetune.max_steps=120",
            "quantizer.fit.max_steps=120",
        ]
    runs = [one_seed(seed, args.bits, overrides) for seed in range(args.seeds)]
    print(f"\n{args.seeds} seeds; rule {args.rule}\n\n{table(runs, args.bits)}")


if __name__ == "__main__":
    main()
