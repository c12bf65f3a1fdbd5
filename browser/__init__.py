"""The feature browser: a Streamlit app over a directory of runs."""
