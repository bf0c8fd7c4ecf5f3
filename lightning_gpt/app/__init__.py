"""The pages of app.py, drawn by Streamlit. Nothing else imports this room."""
