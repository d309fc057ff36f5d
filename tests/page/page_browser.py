"""Chromium through its driver, and the vocabulary with which tests refer to the page."""

import shutil
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-dev-shm-usage")
FLAGS += ("disable-background-networking", "disable-component-update", "disable-sync")

# every text on the page, with its contrast against the background
CONTRASTS = """
const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const over = (top, below) => { const a = top.length > 3 ? top[3] : 1;
  return [0, 1, 2].map(i => top[i] * a + below[i] * (1 - a)); };
const lin = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const lum = c => { const [r, g, b] = c.map(v => lin(v / 255));
  return .2126 * r + .7152 * g + .0722 * b; };
const painted = e => { const all = [];
  for (; e; e = e.parentElement) all.push(parse(getComputedStyle(e).backgroundColor));
  return all.reverse().reduce((below, top) => over(top, below), [255, 255, 255]); };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
while (walker.nextNode()) { const e = walker.currentNode.parentElement, box = e.getBoundingClientRect();
  if (!walker.currentNode.data.trim() || !box.width || !box.height || !e.checkVisibility()) continue;
  const below = painted(e), l = [lum(over(parse(getComputedStyle(e).color), below)), lum(below)].sort((x, y) => y - x);
  found.push([(l[0] + .05) / (l[1] + .05), walker.currentNode.data.trim().slice(0, 60), e.className]); }
return found;
"""


class Page:
    """One browser with the page open.

    Args:
        url: of the page.
        profile: a folder for this browser only.
        width: in pixels; below 600 the browser emulates a phone.
        dark: prefer dark mode.
    """

    def __init__(self, url: str, profile: Path, width: int = 1280, dark: bool = False) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"user-data-dir={profile}", f"window-size={width},1400"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.resize(width)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(url)
        self.until(lambda: self.all("#send"))

    def resize(self, width: int, height: int = 1400) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return self.driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", css)

    def texts(self, css: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css
        )

    def until(self, condition: Any, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"waited {seconds} s; the page says: {self.text('body')[:2000]}"
            time.sleep(0.05)
        return value

    def press(self, css: str) -> None:
        element = self.one(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self, css: str, text: str) -> None:
        box = self.one(f"{css} textarea")
        box.clear()
        if len(text) < 500:
            box.send_keys(text)
        else:  # faster than typing through the driver
            self.driver.execute_script(
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", box, text
            )

    def settings(self, documents: str) -> None:
        if not self.all("#documents textarea"):
            self.press("button.label-wrap")
            self.until(lambda: self.all("#documents textarea"))
        self.write("#documents", documents)

    def choose(self, group: str, name: str) -> None:
        label = next(label for label in self.all(f"{group} label") if label.text.split(" ")[0] == name)
        label.click()

    def say(self, text: str, adapter: str) -> list[str]:
        """Send a message and wait for its figures or an error. Returns the answers so far."""
        turns, old = len(self.all("#figures tbody tr")), "document.querySelectorAll('#alert .gs-alert')"
        self.driver.execute_script(f"{old}.forEach(e => e.dataset.old = 1)")
        self.choose("#adapter", adapter)
        self.write("#message", text)
        self.press("#send")
        self.until(lambda: len(self.all("#figures tbody tr")) > turns or self.all("#alert .gs-alert:not([data-old])"))
        return self.texts("#chat .gs-answer")

    def open(self, tab: str) -> None:
        next(button for button in self.all("button[role=tab]") if button.text == tab).click()

    def picture(self, path: Path) -> None:
        """The whole page, from top to bottom."""
        path.parent.mkdir(parents=True, exist_ok=True)
        width = self.driver.execute_script("return innerWidth")
        for _ in range(2):  # a taller window shows more content
            self.resize(width, self.driver.execute_script("return document.documentElement.scrollHeight"))
            time.sleep(0.3)
        self.driver.save_screenshot(str(path))

    def faint(self) -> list[Any]:
        """Texts whose contrast is below WCAG AA's."""
        return [entry for entry in self.driver.execute_script(CONTRASTS) if entry[0] < 4.5]
