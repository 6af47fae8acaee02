"""What `cascade serve` does: everything but the page itself, which is in `page`.

* `limits`, `asked`: what a visitor may ask for, and what one asked for.
* `places`: the models, runs and sweeps under the folders that the command names.
* `line`: visitors wait in it; one job at a time runs on each device.
* `store`, `engine`: keep loaded stages within a memory limit, and sample with them.
* `comparing`, `watching`: read the files of runs, and load no model.

Visitors pick a model, run or sweep by name from the list that the server found: the server opens no
path, URL or configuration that a visitor sends. Nothing imports torch until the first job runs, so
that the page opens quickly.
"""
