"""Time the tiles that each kernel could have on the GPU found, beside the one that is shipped.

    python -m bench.tune                               on a GPU, in about 90 seconds
    python -m bench.tune --dry --kernel gather_sum     compile them here; no GPU is needed
    python -m bench.tune --device cpu                  in Triton's interpreter, on tiny sizes

First compiles all tiles, in several processes, which takes longer than the timing the first time.
Then every kernel and shape has the same share of the time: the shipped tile comes first, then the
candidates of `tune_table` as long as there is time. A time is the median of events, with the caches
overwritten. Prints each tile when it is timed, the best of each kernel at the end, and writes
bench/results/<device>-tune.json.

--dry prints registers, spills and shared memory for sm_80, sm_90 and sm_100 instead, and exits with
0, since a candidate may fail. The gate for what is shipped is `bench.compiled`.
"""

from __future__ import annotations

import os

from .options import chosen_device, options


def main() -> None:
    """The program."""
    parser = options("tune", __doc__, 90)
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="these only")
    parser.add_argument("--dry", action="store_true", help="compile only, for several chips")
    parser.add_argument("--chip", nargs="+", type=int, default=[80, 90, 100], help="for --dry")
    parser.add_argument("--compile", action="store_true", help="fill Triton's cache, and end")
    parser.add_argument("--timed-only", action="store_true", help="the cache is full already")
    arguments = parser.parse_args()
    if not arguments.dry:
        device = chosen_device(parser, arguments.device)
        if device.type == "cpu":  # before Triton is imported
            os.environ["TRITON_INTERPRET"] = "1"
    from . import tuning
    from .record import Record
    from .tune_table import TUNABLES

    names = [tunable.kernel for tunable in TUNABLES]
    if unknown := set(arguments.kernel) - set(names):
        parser.error(f"--kernel must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if arguments.dry:
        misfits = tuning.compile_jobs(tuple(arguments.kernel), tuple(arguments.chip))
        print(f"{misfits} of the tiles do not compile or fit")
        return
    if device.type == "cuda" and not arguments.timed_only:
        tuning.compile_on_gpu(arguments.kernel)
    if arguments.compile:
        return
    record = Record("tune", arguments.out, arguments.device, arguments.seconds)
    tuning.time_cases(record, arguments.kernel, device)
    print(f"\n{record.tables('best')}\nwritten: {record.path}")


if __name__ == "__main__":
    main()
