"""A headless Chromium that tests control, by the WebDriver protocol: JSON over HTTP.

Debian's packages are chromium and chromium-driver. https://www.w3.org/TR/webdriver2/
"""
import base64
import io
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
SWITCHES = (
    "--headless",
    "--no-sandbox",  # for root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference
KEYS = {"ArrowRight": "\ue014", "ArrowLeft": "\ue012", "Tab": "\ue004", "Space": " "}


class Browser:
    """Use it as a context manager. A phone has a narrow screen with two pixels for each CSS one."""

    def __init__(self, phone=False):
        assert CHROMIUM and CHROMEDRIVER, "the page is tested in a browser: install chromium and chromium-driver"
        self.driver = subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True)
        for line in self.driver.stdout:
            port = re.search(r"on port (\d+)\.", line)
            if port:
                break
        self.url = f"http://localhost:{port[1]}/session"

        options = {"binary": CHROMIUM, "args": [*SWITCHES, "--window-size=1300,900"]}
        if phone:
            screen = {"width": 390, "height": 844, "pixelRatio": 2, "touch": True}
            options["mobileEmulation"] = {"deviceMetrics": screen}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
        self.url += "/" + self.ask("POST", "", capabilities=wanted)["sessionId"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.driver.stdout.close()

    def ask(self, method, path, **words):
        data = json.dumps(words).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data, method=method,
                                         headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            reason = json.load(error)["value"]["message"]
            raise AssertionError(f"{method} {path} {words}: {reason}") from error

    def open(self, path):
        self.ask("POST", "/url", url=path.resolve().as_uri())

    def run(self, script, *args):
        """What the JavaScript function body returns. A promise is waited for."""
        return self.ask("POST", "/execute/sync", script=script, args=args)

    def devtools(self, command, **words):
        """Chromium's own commands: https://chromedevtools.github.io/devtools-protocol/"""
        self.ask("POST", "/goog/cdp/execute", cmd=command, params=words)

    def find(self, selector):
        """The protocol's reference to an element, after scrolling to it."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        return self.ask("POST", "/element", using="css selector", value=selector)[ELEMENT]

    def click(self, selector):
        self.ask("POST", f"/element/{self.find(selector)}/click")

    def press(self, *keys):
        actions = []
        for key in keys:
            value = KEYS.get(key, key)
            actions += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        self.ask("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def look(self, selector):
        """A PIL image of what an element shows on the screen, after it was painted there."""
        element = self.find(selector)
        self.run("return new Promise(done => requestAnimationFrame(() => "
                 "requestAnimationFrame(() => done(true))))")
        shot = self.ask("GET", f"/element/{element}/screenshot")
        return Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")
