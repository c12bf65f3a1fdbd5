"""What `streamlit run` serves: the app, its data as JSON, and a page that says why it cannot connect."""

from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware

from browser import api
from browser.refusals import ExplainRefusals

app = st.App(Path(__file__).with_name("app.py"), routes=api.routes(), middleware=[Middleware(ExplainRefusals)])
