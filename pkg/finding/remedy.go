package finding

// The actions a remedy may name, and what their subject is. What is needed
// beyond the subject (a file's content, a wanted value) stands in the
// requirements of the config under that subject.
const (
	// InstallPackage: the package's literal name on this host.
	InstallPackage = "install-package"
	// ConfigureDpkg: let dpkg finish what was interrupted; the subject is dpkg.
	ConfigureDpkg = "configure-dpkg"
	// EnableUnit, StartUnit, UnmaskUnit: systemd's own name for the unit, never
	// an alias, which `systemctl enable` refuses.
	EnableUnit = "enable-unit"
	StartUnit  = "start-unit"
	UnmaskUnit = "unmask-unit"
	// LoadModule, PersistModule: the module's name as it is required.
	LoadModule    = "load-module"
	PersistModule = "persist-module"
	// SetSysctl, PersistSysctl: the sysctl's name as it is required.
	SetSysctl     = "set-sysctl"
	PersistSysctl = "persist-sysctl"
	// WriteFile: the path.
	WriteFile = "write-file"
	// CreateInitiatorName: the file that gives the iSCSI initiator its name.
	CreateInitiatorName = "create-initiator-name"
	// SetOOMScore, PersistOOMScore: the unit.
	SetOOMScore     = "set-oom-score"
	PersistOOMScore = "persist-oom-score"
)

// The kinds of actions: the words remedies.allow takes.
const (
	KindPackages  = "packages"
	KindUnits     = "units"
	KindModules   = "modules"
	KindSysctls   = "sysctls"
	KindFiles     = "files"
	KindOOMScores = "oomScores"
)

// Kinds lists the kinds in the order of the documentation.
func Kinds() []string {
	return []string{KindPackages, KindUnits, KindModules, KindSysctls, KindFiles, KindOOMScores}
}

// Actions lists every action by its kind, in the order of [Kinds].
func Actions() []string {
	return []string{
		InstallPackage, ConfigureDpkg,
		EnableUnit, StartUnit, UnmaskUnit,
		LoadModule, PersistModule,
		SetSysctl, PersistSysctl,
		WriteFile, CreateInitiatorName,
		SetOOMScore, PersistOOMScore,
	}
}

// Kind returns the kind of an action, "" for a word that is none: what has no
// kind can not be allowed.
func Kind(action string) string {
	switch action {
	case InstallPackage, ConfigureDpkg:
		return KindPackages
	case EnableUnit, StartUnit, UnmaskUnit:
		return KindUnits
	case LoadModule, PersistModule:
		return KindModules
	case SetSysctl, PersistSysctl:
		return KindSysctls
	case WriteFile, CreateInitiatorName:
		return KindFiles
	case SetOOMScore, PersistOOMScore:
		return KindOOMScores
	}
	return ""
}
