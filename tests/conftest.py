"""No test reads or writes the user's folders; compiled kernels are shared, because compiling them takes a minute."""

from __future__ import annotations

import os
import tempfile

from localrun.paths import kernel_dir

os.environ.setdefault("LOCALRUN_KERNEL_DIR", str(kernel_dir()))
_folder = tempfile.TemporaryDirectory(prefix="localrun-tests-")
for _name in ("CACHE", "DATA", "CONFIG"):
    os.environ[f"LOCALRUN_{_name}_DIR"] = os.path.join(_folder.name, _name.lower())
# Spinning threads starve each other when cores are shared; read by libgomp when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
