"""Export as a script, for clusters that run scripts:

    ray job submit --working-dir . -- python jobs/export.py /shared/runs/sft-demo /shared/exports/sft-demo

The same as `rayswift export RUN FOLDER`; both paths are those of the machine that the script runs on.
"""

from rayswift.cli import script

if __name__ == "__main__":
    script("export")
