"""Other libraries' formats: NAME_folder.py is the face of each. What can only be written has neither of the first two.

recognises(folder)            whether it is a folder of the library
load(folder, with_tokenizer)  the Bundle, in eval mode and float32 on the CPU. UserError: a missing or damaged file,
                              weights that do not fit, or what our towers have not, all of it named
write(bundle, folder, place)  fill the existing empty folder, which will lie in `place`; return notes for the user in
                              plain sentences. UserError: what the format cannot express, all of it named
outputs(folder, probe)        what the library makes of the folder; half_outputs: of its files in float16
retarget(folder, source)      of a format that names places: tell the folder where it lies
"""
