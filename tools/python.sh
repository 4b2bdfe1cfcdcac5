#!/bin/sh
# Prints the path of a Python that runs: the one that is named, or the newest from 3.13 down to 3.11. `--all` prints all of them.
# A name on the PATH may be a shim that refuses to run, so every candidate is tried; pyenv's versions are looked at too.
runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
find_one() {
    for candidate in "$(command -v "$1" 2>/dev/null)" "$(pyenv root 2>/dev/null)"/versions/"${1#python}".*/bin/python; do
        if [ -n "$candidate" ] && runs "$candidate"; then "$candidate" -c 'import sys; print(sys.executable)'; return 0; fi
    done
    return 1
}
if [ "$1" = --all ]; then
    for v in 3.14 3.13 3.12 3.11; do find_one "python$v"; done
    exit 0
fi
if [ -n "$1" ]; then
    find_one "$1" && exit 0
    echo "vadnb: '$1' is not a Python of version 3.11 or newer that runs here; name one with PYTHON=/path/to/python" >&2
    exit 2
fi
for v in 3.13 3.12 3.11; do find_one "python$v" && exit 0; done
echo "vadnb: no Python from 3.13 down to 3.11 was found; install one (uv python install 3.13), or name it with PYTHON=/path/to/python" >&2
exit 2
