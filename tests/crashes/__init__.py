"""Does a run survive? Training is killed (SIGKILL) again and again, and must end as if it had not.

``python -m crashes`` in ``tests/`` trains a tiny model many times over, kills each run at random
moments, in chosen phases and in the middle of file-system calls, looks at every file that is left,
resumes the run, and kills it again or lets it end. What has come out then must be, bit for bit,
what comes out of a run that nobody disturbs.

Then the disk is full at one file-system call of a run: it must stop with one sentence, and go on
when it is resumed.

``watch.py`` is what happens inside of a run, ``attempt.py`` starts and kills one, ``outcome.py``
looks at files, ``aim.py`` chooses when to kill, ``subject.py`` does it to one run, ``__main__.py``
to many; ``result.json`` holds what came out of the last long run.
"""
