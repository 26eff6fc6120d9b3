import time,sys
t=time.time(); import keras; print(keras.backend.backend(),'import',time.time()-t)
from keras_effnet import models
t=time.time(); m=models.EfficientNetB0(weights=None); print('build1',time.time()-t)
t=time.time(); m=models.EfficientNetB0(weights=None); print('build2',time.time()-t, len(m.layers), m.count_params())
