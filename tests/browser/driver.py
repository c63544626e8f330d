"What the browser tests share. A real browser: Debian's Chromium, driven by Playwright. Pictures are kept in tests/browser/shots, which git ignores."
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).resolve().parent
SHOTS = HERE/'shots'


def absent(reason):
    "Skip, or fail in CI, where a browser is installed."
    if os.environ.get('CI') == 'true': pytest.fail(f'{reason} (CI=true, so this is no skip)')
    pytest.skip(reason)


@pytest.fixture(scope='module')
def chromium():
    "One browser for a file of tests; Playwright runs once in a process, so the next file's comes after."
    program = shutil.which('chromium') or shutil.which('google-chrome')
    if not program: absent('no chromium on PATH; install it with: apt-get install --no-install-recommends chromium fonts-nanum')
    from playwright.sync_api import sync_playwright
    SHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=['--no-sandbox', '--disable-dev-shm-usage'])
        yield browser
        browser.close()


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def wait_for(what, seconds=60, every=.2):
    "Wait until `what()` is true, and return it."
    deadline = time.monotonic() + seconds
    while not (value := what()):
        if time.monotonic() > deadline: raise TimeoutError(f'{what} was not true within {seconds} s')
        time.sleep(every)
    return value


def answers(url):
    try: return httpx.get(url, timeout=2).status_code < 500
    except httpx.HTTPError: return False


def stop(process, seconds=15):
    "End a process and all it started: SIGTERM, and SIGKILL for what is left."
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try: os.killpg(process.pid, sign)
        except ProcessLookupError: return
        try: process.wait(seconds)
        except subprocess.TimeoutExpired: continue
