#!/bin/bash
# Rendered by `leviathan submit ray`: the environment of every process of a run. `job.sh MODULE FOLDER` becomes the module.
set -e
# until the process listens: a request to save would kill it, and whoever asks repeats it
trap '' USR1
cd -- {{ cwd | sh }}
{% if env_file %}
. {{ env_file | sh }}
{% endif %}
{% for name, value in variables.items() %}
export {{ name }}={{ value | sh }}
{% endfor %}
export PYTHONPATH={{ code | sh }}
exec -- {{ python | sh }} -P -m "$@"
