"""A guard as a moderation server: `python -m guards.serve FOLDER --port 8000`.

__main__.py is the command line, app.py the routes and their limits, batching.py the queue before the
guard, answers.py what a verdict means to a client, page.html the page at `/`.
"""
