#!/bin/sh
# Installs localrun from this folder, without a network, a compiler or root: sh install.sh PREFIX
# Everything goes into PREFIX; removing that folder removes localrun. The work is done by installer/install.py, after the
# checksums of all files here have been found right.
set -eu

PYTHONS="@PYTHONS@"

fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 1
}

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
case "${1:-}" in
    "" | -h | --help)
        printf 'usage: sh install.sh PREFIX\n\nInstalls localrun into the new folder PREFIX, e.g. ~/localrun.\n' >&2
        printf 'PYTHON=/path/to/python3 chooses the Python (one of: %s).\n' "$PYTHONS" >&2
        exit 2
        ;;
esac
[ $# -eq 1 ] || fail "one argument is expected, the folder to install into" "sh install.sh ~/localrun"

version_of() {
    "$1" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

python=""
found=""
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    version=$(version_of "$candidate")
    [ -n "$version" ] || continue
    found="$found $version"
    case " $PYTHONS " in
        *" $version "*) python=$candidate && break ;;
    esac
done
[ -n "$python" ] || fail "no Python of version $PYTHONS (found:${found:- none})" \
    "install one of them and name it: PYTHON=/path/to/python3 sh install.sh PREFIX"

echo "checking the bundle's files" >&2
(cd "$here" && "$python" -I -) <<'CHECK' || fail "the bundle is damaged (see above)" "copy it again"
import hashlib, sys
bad = 0
for line in open("SHA256SUMS", encoding="utf-8"):
    digest, name = line.rstrip("\n").split("  ", 1)
    try:
        with open(name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        found = error.strerror
    if found != digest:
        print(f"{name}: FAILED", file=sys.stderr)
        bad = 1
sys.exit(bad)
CHECK

exec "$python" -I "$here/installer/install.py" "$here" "$1"
