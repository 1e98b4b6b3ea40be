"""The endpoint for Ray Serve's own commands, which own the cluster and the address:

    RAYSWIFT_SERVE=exports/sft-demo RAYSWIFT_API_KEY=... serve run serve.app:app

RAYSWIFT_SERVE is an export folder, or a YAML file with a ServeSpec, whose port does not count here, nor its host where
there is a key. The keys come from RAYSWIFT_API_KEY or the file's api_key_file; RAYSWIFT_ALLOW_NO_KEY=1 does without,
for an address that only this machine reaches: requests to another name than localhost are refused then. Code that
needs Ray Serve beside this folder writes `from ray import serve as ray_serve`: the folder shares its name.
"""

import os
import sys

from rayswift.errors import ConfigError, RaySwiftError
from rayswift.serving import auth
from rayswift.serving.app import build_app
from rayswift.serving.spec import load

try:
    if "RAYSWIFT_SERVE" not in os.environ:
        raise ConfigError("is not set", path="RAYSWIFT_SERVE", fix="set it to an export folder or a YAML file")
    app = build_app(auth.secured_anywhere(load(os.environ["RAYSWIFT_SERVE"])))
except RaySwiftError as error:
    sys.exit(str(error))
