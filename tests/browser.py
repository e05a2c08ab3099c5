"""A headless Chromium, driven through chromedriver by WebDriver's plain HTTP (W3C recommendation, 2018)."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,900"),
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what the recommendation calls one in JSON


class Browser:
    """One page in a browser; use as a context manager. The test skips where there is no Chromium."""

    def __init__(self, folder, port, *flags):
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if not (chromium and driver):
            pytest.skip("needs chromium and chromedriver")
        options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={folder}", *flags]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self.driver = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL)
        self.session = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: self._call("status", method="GET")["ready"], (urllib.error.URLError,))
            session = self._call("session", capabilities={"alwaysMatch": wanted})
        except BaseException:
            self.driver.kill()
            raise
        self.session += f"/session/{session['sessionId']}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._call("", method="DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def _call(self, path, method="POST", **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self.session}/{path}".rstrip("/"), data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise LookupError(json.load(error)["value"]["message"].splitlines()[0]) from None

    def open(self, address):
        self._call("url", url=address)

    def find(self, css, where=True):
        """The first element that is there within some seconds."""
        return wait_for(lambda: self._call("element", using="css selector", value=css)[ELEMENT])

    def click(self, css):
        wait_for(lambda: self._call(f"element/{self.find(css)}/click") is None)

    def press(self, css, text):
        """Type a text; '\\ue007' is Enter. Into what takes a file, its path."""
        self._call(f"element/{self.find(css)}/value", text=text)

    def clear(self, css):
        self._call(f"element/{self.find(css)}/clear")

    def text(self, css):
        return self._call(f"element/{self.find(css)}/text", method="GET")

    def run(self, script):
        return self._call("execute/sync", script=script, args=[])

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self._call("screenshot", method="GET")))

    def hosts(self):
        """Where requests were sent to since this was last asked."""
        rows = (json.loads(row["message"])["message"] for row in self._call("se/log", type="performance"))
        sent = (row["params"]["request"]["url"] for row in rows if row["method"] == "Network.requestWillBeSent")
        return {url.split("/")[2] for url in sent if url.startswith(("http", "ws"))}


def wait_for(ready, passed_over=(), seconds=60):
    """What `ready` returns once it is true; LookupError and what is passed over count as not yet."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := ready():
                return found
        except (LookupError, *passed_over):
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "not ready in time"
        time.sleep(0.05)
