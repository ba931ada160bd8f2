from .models import create_model, convert_asvit_state_dict
