"""``setfit-kd export``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from setfit_kd.cli import questions
from setfit_kd.cli.options import FRACTION, output_options, passed, pickle_option, setting_options
from setfit_kd.config.run import RunConfig
from setfit_kd.config.values import BUNDLE_FORMATS
from setfit_kd.errors import DataError

logger = logging.getLogger(__name__)

_DEFAULT_TEXTS = "bundled:newswire"


@click.command()
@click.argument("model", metavar="RUN_OR_MODEL")
@click.option("--output-dir", required=True, type=click.Path(path_type=Path), metavar="FOLDER",
              help="Output folder of the bundle.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an earlier bundle in the output folder.")
@click.option("--format", "format_", type=click.Choice(BUNDLE_FORMATS), default=None,
              help="Format: ONNX in fp32, ONNX in int8, or static token vectors. [default: static for static students, "
              "onnx-int8 for others]")  # fmt: skip
@click.option("--min-agreement", type=FRACTION, default=None, metavar="X",
              help="Minimum agreement of the bundle with the model, as a fraction of the texts, or of the decisions on "
              "all labels of all texts. [default: 0.98 for onnx-int8, 0.999 for others]")  # fmt: skip
@setting_options("unlabeled", "text_column", "pair_column")
@pickle_option
@output_options
def export(
    model: str,
    output_dir: Path,
    overwrite: bool,
    format_: str | None,
    min_agreement: float | None,
    trust_pickle: bool,
    **flags: Any,
) -> None:
    """Export a classifier as a bundle: one folder that runs without torch.

    RUN_OR_MODEL is a run folder, one of its students, a SetFit model or a transformer. The predictions of the bundle
    are compared with those of the model on the run's pool, or on the texts of --unlabeled. For a transformer that
    answers questions, --unlabeled names questions with their contexts.
    """
    config = RunConfig.of(**passed(flags))

    from setfit_kd.cli.output import echo
    from setfit_kd.export.bundle import check_output, export_bundle
    from setfit_kd.inference.answerer import answerer_folder
    from setfit_kd.inference.classifier import check_pairs
    from setfit_kd.models.bodies import takes_pairs
    from setfit_kd.models.io import load_classifier

    check_output(output_dir, overwrite=overwrite)
    path = Path(model)
    options: Any = {"format": format_, "min_agreement": min_agreement, "overwrite": overwrite}
    options["title"] = path.resolve().name
    if answerer := answerer_folder(model):
        bundle, example = questions.export(answerer, output_dir, config.unlabeled, options), 'answer.py "..." "..."'
    else:
        loaded, texts = load_classifier(model, device="cpu", trust_pickle=trust_pickle), _texts(path, config)
        has_pairs = takes_pairs(loaded.model_body)
        check_pairs(model, texts, takes_pairs=has_pairs)
        example = 'classify.py "..."' + ' "..."' * has_pairs
        bundle = export_bundle(loaded, output_dir, texts=texts, **options)
    parity = bundle.parity
    echo(f"Wrote {bundle.format} bundle to {output_dir} ({bundle.megabytes:.1f} MB).")
    difference = f"Probabilities differ by at most {parity['largest_difference']:.2g}."
    echo(f"Agreement with the model: {parity['agreement']:.1%}, on {parity['texts']:,} texts. {difference}")
    echo(f"To use it, here or on another machine: python {output_dir}/{example}")


def _texts(model: Path, config: RunConfig) -> list[str]:
    """Return the texts to check the bundle on: from --unlabeled, else the pool of the run, else the bundled corpus."""
    from setfit_kd.data.sources import read
    from setfit_kd.run_folder.folder import RunFolder
    from setfit_kd.run_folder.names import CONFIG_FILE, RUN_FILE, SIGNALS, TEACHER_SIGNALS
    from setfit_kd.signals.files import read_signals
    from setfit_kd.signals.signals import TeacherSignals

    if config.unlabeled is not None:
        return read(config.unlabeled, text_column=config.text_column, pair_column=config.pair_column).texts
    for folder in (model, *model.absolute().parents[:2]):
        if (folder / CONFIG_FILE).is_file() and (folder / RUN_FILE).is_file():
            pools = [path for path in (folder / SIGNALS, *(folder / TEACHER_SIGNALS).glob("*")) if path.is_dir()]
            source = RunFolder.read_settings(folder).get("signals")
            try:
                if pools:
                    return TeacherSignals.load(pools[0]).texts
                if source:
                    return read_signals(str(source)).texts
            except DataError as error:
                raise DataError(error.message, hint="Pass texts to check the bundle on with --unlabeled.") from None
    message = "%s is not part of a run: checking the bundle on %s. Pass your own texts with --unlabeled."
    logger.warning(message, model, _DEFAULT_TEXTS)
    return read(_DEFAULT_TEXTS).texts
