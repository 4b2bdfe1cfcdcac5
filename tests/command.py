"The command line in this process"
import contextlib, io, warnings
import pytest
from vadnb.cli import main

def vadnb(*words):
    "Exit code, stdout and stderr of a command in this process"
    out,err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as left: main([str(w) for w in words])
    return left.value.code, out.getvalue(), err.getvalue()
