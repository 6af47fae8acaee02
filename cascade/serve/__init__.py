"""What `cascade serve` does: everything but the page itself, which is in `page`.

* `limits`, `asked`: what a visitor may ask for, and what one asked for.
* `places`: the models, runs and sweeps under the folders that the command names.
* `line`: visitors wait in it; one job at a time runs on each device.
* `store`, `engine`: loaded stages within a memory limit, and what is made with them.
* `comparing`, `watching`: what is read from the files of runs alone.

A visitor chooses from what was found, by its name: no path, URL or configuration that a visitor
sends is ever opened. Until the first job runs nothing imports torch, so that the page is there
soon.
"""
