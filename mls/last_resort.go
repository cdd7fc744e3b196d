package mls

// LastResort says whether its owner marked the KeyPackage as one that may be used more than once, where all others are
// used up (draft-ietf-mls-extensions, Section 6.4). Who receives an Add can judge by that.
func (kp *KeyPackage) LastResort() bool {
	d, err := dictionaryOf(kp.Extensions)
	if err != nil {
		return false
	}
	data, ok := d.Get(ComponentLastResort)
	return ok && len(data) == 0
}
