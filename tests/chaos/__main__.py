"""`python -m chaos`: see `chaos.rehearsal`."""

import sys

if __name__ == "__main__":
    # Here, because each process that is started imports this file.
    from chaos.rehearsal import main

    sys.exit(main())
