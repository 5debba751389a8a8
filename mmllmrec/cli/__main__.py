"""``python -m mmllmrec.cli``, as a launcher of processes calls it."""

from mmllmrec.cli import main

main()
