"""`python -m chaos`: see `chaos.rehearsal`; `python -m chaos kills`: see `chaos.kills`."""

import sys

if __name__ == "__main__":
    # Here, because each process that is started imports this file.
    from chaos import kills, rehearsal

    sys.exit(kills.main(sys.argv[2:]) if sys.argv[1:2] == ["kills"] else rehearsal.main())
