"""Other libraries' formats: NAME_folder.py is the face of each, which recognises, loads and writes a folder."""
