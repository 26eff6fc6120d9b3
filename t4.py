import os; os.environ['TF_CPP_MIN_LOG_LEVEL']='3'
import cProfile,pstats,time
import keras, keras_effnet as ke
from keras_effnet import models
keras.applications.EfficientNetB0(weights=None); models.EfficientNetB0(weights=None)
a,b=[],[]
for _ in range(6):
    t=time.time(); keras.applications.EfficientNetB0(weights=None); a.append(time.time()-t)
    t=time.time(); models.EfficientNetB0(weights=None); b.append(time.time()-t)
print('apps',sorted(a)[3],'ours',sorted(b)[3])
p=cProfile.Profile(); p.enable(); models.EfficientNetB0(weights=None); p.disable()
pstats.Stats(p).sort_stats('cumtime').print_stats(45)
