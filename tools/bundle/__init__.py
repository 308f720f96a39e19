"""Makes the bundle: one folder (and tar) from which localrun is installed on a machine without a network. `make bundle`.

    python -m tools.bundle            makes dist/localrun-VERSION-linux-MACHINE and the tar beside it
    python -m tools.bundle.prove      installs it in a network namespace without interfaces and uses it there

What is in it: wheels for every supported Python, llama-cpp-python compiled portably, localrun with the demo model, `install.sh`,
licences, checksums. Downloads and the compiled wheel are kept in `build/bundle-cache`.
"""
