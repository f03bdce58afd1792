"""Puts a trained state into its base model: python merge_state.py BASE STATE OUTPUT."""

import signal
import sys

from src.cli import merge_arguments
from src.errors import exit_on_user_error


def main() -> int:
    """Parses the command line, merges, and says what was written."""
    arguments = merge_arguments()

    from src.merge import merge_state  # torch takes seconds to load; `-h` need not wait for it

    # An ended process must take its unfinished file with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    report = merge_state(arguments.base_model, arguments.state_checkpoint, arguments.output)

    shape = report.shape
    print(
        f"merged   {shape.n_layer} layers of state [{shape.n_head}, {shape.head_size}, {shape.head_size}] "
        f"in {report.state_dtype}{', replacing the one that was there' if report.replaced_state else ''}"
    )
    print(f"base     {shape.parameter_count:,} weights in {report.base_dtype}, copied bit for bit")
    print(f"written  {arguments.output} ({report.size_bytes:,} bytes)")
    print("next     load it like the base model: clients on the rwkv package (0.8.26 and later) start every")
    print("         conversation from the state; ChatRWKV and RWKV-Runner take the state file itself instead")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
