"""Serving as a script, for clusters that run scripts:

    ray job submit --working-dir . -- python jobs/serve.py /shared/exports/sft-demo --port 8000

The same as `rayswift serve FOLDER`. It runs until the job is stopped.
"""

from rayswift.cli import script

if __name__ == "__main__":
    script("serve")
