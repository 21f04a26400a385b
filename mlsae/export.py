"""Write what other tools read of a trained MLSAE; take their explanations as labels.

    python -m mlsae.export runs/demo --to delphi --tokens 1000000    # activations, to explain
    python -m mlsae.export runs/demo --labels_from results/explanations      # and back, as labels
    python -m mlsae.export runs/demo --to neuronpedia                        # a source per layer

delphi (EleutherAI's eai-delphi) explains and scores latents by their activations on held-out text,
which it reads from a folder per layer. Its folder of explanations, given to --labels_from, becomes
labels of the run's latents, where they have none: the report and the app show them.

neuronpedia takes the run's own analysis (python -m mlsae.analyze RUN) and its labels: for each
layer the active latents with what they promote and suppress, and their examples. The ids of latents
are the same in all of its sources.

The folder, RUN-delphi or RUN-neuronpedia if --out is not given, is written whole or not at all.
"""

from __future__ import annotations

import sys

from .cli import parse, run_program
from .exports.run import ExportConfig, export
from .report import redraw


def export_and_print(config: ExportConfig) -> None:
    """Export, say what was written, and redraw the report, which shows labels."""
    print(export(config))
    if config.labels_from is not None:
        redraw(config.run)


def main() -> None:
    """Run the program."""
    config = parse(ExportConfig, __doc__, sys.argv[1:], "python -m mlsae.export")
    run_program(lambda: export_and_print(config))


if __name__ == "__main__":
    main()
