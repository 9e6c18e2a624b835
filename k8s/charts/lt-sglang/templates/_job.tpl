{{- /* A pod with an engine's image, model and GPUs that runs lt-sglang eval or calibrate. */ -}}
{{- define "lt.jobPod" -}}
{{- $e := .Values.engine }}{{ $j := .Values.job -}}
metadata:
  labels: {{ include "lt.selector" (list . "job") }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "lt.engine" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- mergeOverwrite (include "lt.podSecurity" . | fromYaml) $e.podSecurityContext | toYaml | nindent 4 }}
  {{- include "lt.placement" . | nindent 2 }}
  {{- if include "lt.downloads" . }}
  initContainers:
    - {{ include "lt.waitContainer" . | nindent 6 | trim }}
  {{- end }}
  containers:
    - name: job
      image: {{ include "lt.image" (list . .Values.image) | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      workingDir: /work
      args:
        - {{ $j.command }}
        - {{ printf "--model-path=%s" (include "lt.modelPath" .) | quote }}
        {{- range $j.args }}
        - {{ . | quote }}
        {{- end }}
      env:
        {{- include "lt.engineEnv" . | nindent 8 }}
      {{- include "lt.engineResources" . | nindent 6 }}
      securityContext:
        {{- mergeOverwrite (include "lt.containerSecurity" . | fromYaml) $e.securityContext | toYaml | nindent 8 }}
      volumeMounts:
        {{- include "lt.engineMounts" . | nindent 8 }}
        - {name: work, mountPath: /work}
  volumes:
    {{- include "lt.engineVolumes" . | nindent 4 }}
    - name: work
      {{- if $j.claim }}
      persistentVolumeClaim: {claimName: {{ $j.claim | quote }}}
      {{- else }}
      emptyDir: {sizeLimit: 10Gi}
      {{- end }}
{{- end }}
