"""The agent: what does everything that happens inside a sandbox, of the standard library alone.

Two ways to start it. A keeper forks, sets up the child's namespaces, closes what the child should not have and calls
`agent.serve(connection, settings)` there. Or `python -I -S FOLDER SOCKET` runs this folder, or a zip of it, by its
`__main__`. Nothing here imports the rest of the package, and nothing needs a Python newer than 3.9.
"""
