"""`bench soak`: does a server write under load what it writes alone?"""
