"""The demo as its user has it: the command started, its page used in a browser, the command ended by Ctrl-C."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from browser import Browser, wait_for
from interop.small_bundles import small_bundle
from PIL import Image

from contrastive.data.prompts import load_templates
from contrastive.evaluate.demo_page import label_scores
from contrastive.files import write_folder
from contrastive.interop.bundle import save_model

LABELS = ("red circle", "blue star", "green ring")
ENTER = "\ue007"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.mark.slow
def test_page_is_used_and_ended(tmp_path, photos, free_port):
    pytest.importorskip("gradio")
    bundle, model = small_bundle("siglip"), tmp_path / "model"
    parts = bundle.model.state_dict(), bundle.config, bundle.preprocess.config, bundle.tokenizer
    write_folder(model, lambda to: save_model(to, *parts))
    command = [sys.executable, "-m", "contrastive", "demo", str(model), str(photos), "--port", str(free_port)]
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    with (
        Browser(tmp_path / "browser", free_port + 1) as browser,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as demo,
    ):
        try:
            address = next(found[0] for found in map(re.compile(r"http\S+").search, demo.stderr) if found)
            use(browser, address, bundle, photos)
            browser.screenshot(tmp_path / "page.png")  # to be looked at
            demo.send_signal(signal.SIGINT)
            assert (demo.wait(30), demo.stderr.read()) == (0, "ended\n")
        finally:
            demo.kill()
    assert not list(tmp_path.glob("contrastive-demo-*"))  # what was dropped is gone


def use(browser, address, bundle, photos):
    browser.open(address)
    browser.press("#image input[type=file]", str(photos / "1.png"))
    browser.press("#labels textarea", ", ".join(LABELS) + ENTER)
    expected = label_scores(bundle, (photos / "1.png").read_bytes(), LABELS, load_templates("photo"))
    best = int(expected.shares.argmax())
    told = wait_for(lambda: "share" in browser.text("#bars") and browser.text("#bars"))
    assert f"{LABELS[best]} {100 * expected.shares[best]:.1f} %" in " ".join(told.split())

    browser.click("button[role=tab]:nth-child(2)")
    browser.press("#sentence textarea", "a red circle" + ENTER)
    wait_for(lambda: "whole sentence" in browser.text("#heat"))
    browser.click("#word label:nth-child(3) input")
    wait_for(lambda: "What “red” changes" in browser.text("#heat"))
    assert browser.find("#heat section > img")

    browser.click("button[role=tab]:nth-child(3)")
    browser.press("#text textarea", "a blue star" + ENTER)
    wait_for(lambda: "nearest 3 of 3 images" in browser.text("#note"))
    before = browser.run("return document.querySelector('#image img').src")
    browser.click(".found button.thumbnail-item")
    wait_for(lambda: browser.run("return document.querySelector('#image img').src") != before)

    browser.click("button[role=tab]:nth-child(1)")
    browser.press("#image input[type=file]", str(photos.parent / "broken.png"))
    wait_for(lambda: browser.text("#bars") == "the image cannot be read (unreadable image); give another file")
    assert browser.hosts() == {address.split("/")[2]}
