"""The address at which the page asks for work: to whom it answers, and for how long."""

import asyncio
import json
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from cascade.errors import UserError
from cascade.formats.rgb import picture
from cascade.serve.line import Line
from cascade.serve.page.following import Asked, Desk
from cascade.serve.page.pieces import EXACT, LARGEST_SO_FAR, so_far
from cascade.serve.page.sent import decoded, number, text, whole
from cascade.serve.page.stream import Streams


def desk(work, devices=1, **options):
    """A desk with one part, whose only value is given to `work`."""
    line = Line(lambda number: f"device {number}", **options)
    line.start(devices)
    found = Desk(line)
    found.parts["paint"] = (
        1, lambda value: Asked(lambda device, job: work(value, device, job), lambda r: f"[{r}]")
    )  # fmt: skip
    return found


class Visit:
    """A request: its status, its pages, and when the browser leaves it."""

    def __init__(self, desk, value="a", path="/jobs/paint", method="POST", admitted=True):
        self.desk, self.status, self.pages, self.left = desk, None, [], asyncio.Event()
        self.scope = {"type": "http", "path": path, "method": method, "headers": []}
        self.body = json.dumps({"data": [value]}).encode()
        self.admitted, self.checked = admitted, []

    async def gradio(self, scope, receive, send):
        self.checked.append((scope["method"], scope["path"]))
        status = 200 if self.admitted else 401
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive(self):
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self.status == 200 and message["body"]:
            self.pages.append(json.loads(message["body"]))

    async def made(self):
        await Streams(self.gradio, self.desk)(self.scope, self.receive, self.send)
        return self


def visited(*visits):
    """What became of visits that were made at once."""

    async def every():
        return await asyncio.gather(*(visit.made() for visit in visits))

    return asyncio.run(every())


def test_pages_of_the_steps_come_and_then_the_result():
    def work(value, device, job):
        for i in range(3):
            pictures = np.full((1, 16, 16, 3), i, dtype=np.uint8)
            job.report(
                SimpleNamespace(what="x", share=i / 3, at=i, of=3, pictures=pictures, first=0)
            )
            time.sleep(0.3)
        return f"{value} on {device}"

    (visit,) = visited(Visit(desk(work)))
    assert visit.checked == [("GET", "/gradio_api/login_check")]
    *steps, last = visit.pages
    seen = [int(found[1]) for page in steps if (found := re.search(r"step (\d) of 3", page))]
    assert seen == sorted(set(seen))  # some may be left out, but never the first
    assert seen[0] == 0
    assert len(seen) > 1
    assert "data:image/png" in next(page for page in steps if "step 0" in page)
    assert last.endswith("[a on device 0]")


def test_who_gave_no_password_is_refused_and_starts_nothing():
    began = []
    (visit,) = visited(Visit(desk(lambda *of: began.append(of)), admitted=False))
    assert visit.status == 401
    assert not visit.pages
    assert not began


@pytest.mark.parametrize(("path", "method"), [("/jobs/other", "POST"), ("/jobs/paint", "GET")])
def test_there_is_nothing_else(path, method):
    (visit,) = visited(Visit(desk(lambda *_: 1), path=path, method=method))
    assert visit.status == 404


def test_what_is_no_work_goes_to_gradio():
    (visit,) = visited(Visit(desk(lambda *_: 1), path="/config", method="GET"))
    assert visit.checked == [("GET", "/config")]


def test_a_browser_that_leaves_ends_its_work():
    ended, began = threading.Event(), threading.Event()

    def forever(value, device, job):
        try:
            while True:
                began.set()
                job.report(None)
                time.sleep(0.005)
        finally:
            ended.set()

    async def leave(visit):
        made = asyncio.ensure_future(visit.made())
        await asyncio.to_thread(began.wait, 10)
        visit.left.set()
        await made

    asyncio.run(leave(Visit(desk(forever))))
    assert ended.wait(10)


def test_who_waits_and_leaves_is_forgotten():
    at = desk(lambda value, device, job: value, devices=0)

    async def leave(visit):
        made = asyncio.ensure_future(visit.made())
        while not at.line._jobs:
            await asyncio.sleep(0.01)
        visit.left.set()
        await made
        return at.line.submit(lambda *_: 1)

    job = asyncio.run(leave(Visit(at)))
    assert at.line.before(job) == 0


def test_everybody_gets_their_own_and_each_device_does_one_job_at_a_time():
    running, most, lock = {}, {}, threading.Lock()

    def work(value, device, job):
        with lock:
            running[device] = running.get(device, 0) + 1
            most[device] = max(most.get(device, 0), running[device])
            both.add(sum(running.values()))
        time.sleep(0.01)
        with lock:
            running[device] -= 1
        return value

    both = set()
    at = desk(work, devices=2)
    found = visited(*(Visit(at, f"visitor {i}") for i in range(20)))
    assert [visit.pages[-1].endswith(f"[visitor {i}]") for i, visit in enumerate(found)] == [
        True
    ] * 20
    assert most == {"device 0": 1, "device 1": 1}
    assert max(both) == 2  # the devices work at the same time


def test_too_many_are_told_so():
    at = desk(lambda value, device, job: time.sleep(0.3), most=2)
    found = visited(*(Visit(at) for _ in range(6)))
    assert {visit.status for visit in found} == {200}
    refused = [visit for visit in found if "requests wait already" in visit.pages[-1]]
    assert 2 <= len(refused) <= 4


def test_what_is_not_possible_is_told():
    def refuse(value):
        raise UserError("<b>choose</b> another")

    at = desk(lambda *_: 1)
    at.parts["paint"] = 1, refuse
    (visit,) = visited(Visit(at))
    assert "&lt;b&gt;choose" in visit.pages[-1]
    assert 'role="alert"' in visit.pages[-1]
    at.parts["paint"] = 2, refuse
    (visit,) = visited(Visit(at))
    assert "load it again" in visit.pages[-1]


def test_pictures_so_far_are_small():
    noise = np.random.default_rng(0).integers(0, 256, (2, 1024, 512, 3), dtype=np.uint8)

    def files(page):
        return [part.partition('"')[0] for part in page.split('src="')[1:]]

    page = so_far(noise, 3)
    assert [picture(decoded(file)).shape for file in files(page)] == [(256, 128, 3)] * 2
    assert max(map(len, files(page))) < 40_000
    assert "picture 4 so far" in page
    assert "picture 5 so far" in page
    tiny = noise[:1, :EXACT, :16]
    assert (
        picture(decoded(so_far(tiny, 0).partition('src="')[2].partition('"')[0])) == tiny[0]
    ).all()
    assert LARGEST_SO_FAR == 256


@pytest.mark.parametrize("value", ["1", True, -1, 101, float("nan"), float("inf"), 10**400, [1]])
def test_other_values_are_no_numbers(value):
    with pytest.raises(UserError, match="guidance"):
        number(value, "guidance", 0, 100)


def test_numbers_and_texts():
    assert number(None, "x", 0, 1) is number("", "x", 0, 1) is None
    assert whole(3.0, "x") == 3
    assert text(None) == ""
    for call in (lambda: whole(2.5, "x"), lambda: whole(2**60, "x"), lambda: text(1)):
        with pytest.raises(UserError):
            call()
