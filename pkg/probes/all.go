package probes

// Settings is the `probes:` section of the config. A new probe is one file, one
// field here and one line in List.
type Settings struct {
	Time      Time            `json:"time"`
	Disks     Disks           `json:"disks"`
	Multipath Multipath       `json:"multipath"`
	ISCSI     ISCSI           `json:"iscsi"`
	PIDs      PIDs            `json:"pids"`
	OOM       OOM             `json:"oom"`
	Packages  Packages        `json:"packages"`
	Units     Units           `json:"units"`
	Kernel    Kernel          `json:"kernel"`
	Updates   Updates         `json:"updates"`
	Kubelet   KubeletSettings `json:"kubelet"`
}

// Defaults returns the settings of a config that says nothing.
func Defaults() Settings {
	return Settings{
		Time:      DefaultTime(),
		Disks:     DefaultDisks(),
		Multipath: DefaultMultipath(),
		ISCSI:     DefaultISCSI(),
		PIDs:      DefaultPIDs(),
		OOM:       DefaultOOM(),
		Packages:  DefaultPackages(),
		Units:     DefaultUnits(),
		Kernel:    DefaultKernel(),
		Updates:   DefaultUpdates(),
		Kubelet:   DefaultKubeletSettings(),
	}
}

// List returns every probe, switched on or not, in the order tables show them.
func (s Settings) List() []Probe {
	return []Probe{s.Time, s.Disks, s.Multipath, s.ISCSI, s.PIDs, s.OOM, s.Packages, s.Units, s.Kernel, s.Updates, s.Kubelet}
}
